from .comparison import compare_studies as compare_studies
from .search import search_layers as search_layers
from .statistics import Estimate as Estimate
from .statistics import estimate as estimate
from .statistics import relative_difference as relative_difference
from .study import Cell as Cell
from .study import Study as Study
from .study import run_study as run_study
