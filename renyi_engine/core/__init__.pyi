from . import files as files, output_folder as output_folder, seeding as seeding, typos as typos
from .cuda_graphs import (
    MOST_SHAPES as MOST_SHAPES,
    Pool as Pool,
    Recordings as Recordings,
    Surroundings as Surroundings,
)
from .files import read_json as read_json, write_text as write_text
from .flags import Parser as Parser, parse as parse
from .memory import (
    DoesNotFit as DoesNotFit,
    is_out_of_memory as is_out_of_memory,
    must_fit as must_fit,
    size_of_memory as size_of_memory,
)
from .messages import reason as reason, some as some
from .output_folder import CONFIG_FILE as CONFIG_FILE
from .packed_rows import attention_of as attention_of
from .progress import TrainingProgress as TrainingProgress, track as track
from .settings import (
    SQUARABLE as SQUARABLE,
    changes as changes,
    flag as flag,
    is_squarable as is_squarable,
    read_yaml as read_yaml,
    require as require,
    require_given as require_given,
    require_kinds as require_kinds,
    required as required,
    to_dict as to_dict,
    to_yaml as to_yaml,
)
from .signals import StopSignals as StopSignals, exit_at_once as exit_at_once
from .software_versions import versions as versions
from .terminal import (
    one_line as one_line,
    only_text as only_text,
    use_plain_warnings as use_plain_warnings,
    visible as visible,
)
