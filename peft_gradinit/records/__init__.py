"""What is kept of an adapter: its LoRA file, its `gradinit.json`, its report and its card."""

from .adapters import (
    SavedAdapter,
    check_place,
    read_adapter,
    relative_norm,
    same_layers,
    write_adapter,
)
from .card import complete_card, new_card
from .digests import (
    check_digests,
    check_finite,
    meaning,
    note_entries,
)
from .hub import adapter_folder, hub_id
from .live import (
    AdapterRecord,
    WithReports,
    attach_record,
    attached_record,
    init_report,
    keep_record,
    record_of,
    records_of,
    targets_asked,
    told_record,
)
from .lora_file import (
    A_KEY,
    B_KEY,
    OUT_OF_ATTENTION,
    PREFIX,
    alpha_growth,
    alpha_of,
    depends_on_order,
    doubled,
    entries,
    is_prefixed,
    linear_layers,
    name_in_file,
    overwrites_base,
    patterns,
    plain_config,
    rank_of,
    scaling,
    unscaled,
)
from .names import (
    CARD,
    PICTURE,
    PROVENANCE_FILE,
    base_class,
    give_padding_token,
    label_count,
    padding_token,
)
from .picture import BLOCK
from .provenance import EXPORT_FORMAT, facts_of, read_provenance, write_provenance
from .publishing import attend, check_no_conversion, saved, unsaved, write_card
from .reading import read_dict, read_tensors
from .report import InitReport, LearningRate, ModuleReport, StepCheck, by_parameter
from .table import as_text, table_of
