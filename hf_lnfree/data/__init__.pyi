from .arguments import DataArguments as DataArguments
from .splits import TextData as TextData
from .splits import load_data as load_data
from .windows import TokenWindows as TokenWindows
