from .batches import (
    collate as collate,
    left_padded as left_padded,
    longest_first as longest_first,
    pack as pack,
    packed_length as packed_length,
    pad_token_id as pad_token_id,
)
from .columns import (
    columns_of as columns_of,
    missing_column as missing_column,
    require_field as require_field,
    unexpected as unexpected,
    warn_unread as warn_unread,
)
from .conversation import CONTEXT_COLUMNS as CONTEXT_COLUMNS, Context as Context, is_conversation as is_conversation
from .encoding import Encoder as Encoder, encode_prompts as encode_prompts, stop_tokens as stop_tokens
from .examples import (
    Dropped as Dropped,
    Example as Example,
    describe_dropped as describe_dropped,
    name_rows as name_rows,
    tokenize as tokenize,
)
from .excerpts import excerpt as excerpt, marked as marked
from .filled_rows import Filler as Filler, RowSizes as RowSizes, choose_sizes as choose_sizes, fill as fill
from .reasoning import (
    ANALYSIS as ANALYSIS,
    FINAL as FINAL,
    decode_answer as decode_answer,
    without_thought as without_thought,
)
from .row_files import Row as Row, csv_cells as csv_cells, read_file as read_file
from .rows import Splits as Splits, content_hash as content_hash, given_rows as given_rows, load_splits as load_splits
from .sampling import StepSampler as StepSampler
from .turns import common_prefix as common_prefix
