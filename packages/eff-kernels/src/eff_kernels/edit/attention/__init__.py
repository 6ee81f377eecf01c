"""The one way to read and change the attention of a model, whatever library it comes from.

`intercept_attention` puts a rule in: ``rule(call, attend) -> output``. `observe_attention` looks on. `rows`, `columns`,
`masses`, `column_sums`, `entropy` and `log_sum_exp` tell about a call without a whole map in memory.
"""

from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput, Edit, Part, head_indices
from eff_kernels.edit.attention.diffusers import joint_attention
from eff_kernels.edit.attention.explicit import attend_explicit, dense
from eff_kernels.edit.attention.follow import find_decoder, tokens_of
from eff_kernels.edit.attention.intercept import (
    Found,
    decoder_attention,
    find_attention,
    intercept_attention,
    observe_attention,
)
from eff_kernels.edit.attention.measure import column_sums, columns, entropy, log_sum_exp, masses, rows
from eff_kernels.edit.attention.stack import Attend, Rule
from eff_kernels.edit.attention.tokens import Role, TokenRoles, Tokens

__all__ = [
    "Attend",
    "AttentionCall",
    "AttentionOutput",
    "Edit",
    "Found",
    "Part",
    "Role",
    "Rule",
    "TokenRoles",
    "Tokens",
    "attend_explicit",
    "column_sums",
    "columns",
    "decoder_attention",
    "dense",
    "entropy",
    "find_attention",
    "find_decoder",
    "head_indices",
    "intercept_attention",
    "joint_attention",
    "log_sum_exp",
    "masses",
    "observe_attention",
    "rows",
    "tokens_of",
]
