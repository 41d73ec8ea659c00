from .calls import AttentionCall as AttentionCall
from .calls import attention_calls as attention_calls
from .fused import RowEntropies as RowEntropies
from .fused import attention_entropy_with_grad as attention_entropy_with_grad
from .fused import fused_attention_entropy as fused_attention_entropy
from .fused import head_entropy_with_grad as head_entropy_with_grad
from .statistics import RowStatistics as RowStatistics
