import pytest
import torch

from attnzoo.tasks.records import Record
from tests.bench.data import cost, quality, record_data


@pytest.fixture(autouse=True)
def threads_as_they_were():
    """A job that is run in this process sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_record():
    return lambda **changes: Record.model_validate(record_data(**changes))


@pytest.fixture
def run_records(make_record):
    """A whole small run: dense, a faster, a slower and a broken attention at two token counts, and their quality."""

    def other(label, **changes):
        return {"label": label, "attention": label.split()[0], "is_baseline": False, **changes}

    slow, fast = quality(0.95, 1.0), quality(0.70, 0.737)
    records = [
        make_record(kind="quality", tokens=0, cost=None, gate=None, quality=quality()),
        make_record(**other("slow", kind="quality", tokens=0, cost=None, gate=None, quality=slow)),
        make_record(**other("fast", kind="quality", tokens=0, cost=None, gate=None, quality=fast)),
    ]
    for tokens in (16, 64):
        broken = {"cost": None, "status": "oom", "message": "no memory <left>\nat all", "gate": None, "shapes": None}
        records += [
            make_record(tokens=tokens, quality=quality()),
            make_record(**other("slow", tokens=tokens, cost=cost(0.5), quality=slow)),
            make_record(**other("fast", tokens=tokens, cost=cost(2.0), quality=fast)),
            make_record(**other("big", tokens=tokens, **broken)),
        ]
    return records
