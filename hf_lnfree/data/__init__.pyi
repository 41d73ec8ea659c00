from .arguments import DataArguments as DataArguments
from .splits import RunData as RunData
from .splits import load_data as load_data
from .windows import TokenWindows as TokenWindows
