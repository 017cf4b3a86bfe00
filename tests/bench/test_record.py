import json
import subprocess
import sys
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from attnzoo.bench.record import Envelope
from attnzoo.bench.store import RecordStore, read_records
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.tasks.records import Record
from tests.bench.data import HASH, record_data


def lines_of(*records):
    return b"".join(record.model_dump_json().encode() + b"\n" for record in records)


def test_the_schema_is_strict():
    for change in ({"extra": 1}, {"status": "fine"}, {"seconds": float("nan")}, {"tokens": -1}, {"schema_version": 5}):
        with pytest.raises(ValidationError):
            Record.model_validate(record_data(**change))


@given(
    st.builds(
        record_data,
        label=st.text(max_size=20),
        message=st.text(max_size=80),
        seconds=st.floats(0, 1e9),
        tokens=st.integers(0, 10**9),
        status=st.sampled_from(["ok", "oom", "unsupported", "failed", "timeout"]),
        options=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3),
    )
)
def test_a_record_reads_back_as_itself(data):
    record = Record.model_validate(data)
    line = record.model_dump_json()
    assert "\n" not in line
    assert Record.model_validate_json(line) == record


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_last_line_is_dropped_loudly_wherever_it_tore(tmp_path, data):
    first, second = Record.model_validate(record_data()), Record.model_validate(record_data(tokens=64, label="é"))
    whole, last = lines_of(first), lines_of(second)
    path = tmp_path / "records.jsonl"
    cut = data.draw(st.integers(1, len(last) - 2), label="bytes of the last line that reached the disk")
    path.write_bytes(whole + last[:cut])
    with pytest.warns(UserWarning, match=f"torn last line of {cut} bytes"):
        assert read_records(path, Record) == [first]
    with pytest.warns(UserWarning, match="torn last line"), RecordStore(tmp_path, Record, HASH) as store:
        store.append(second)
    assert path.read_bytes() == whole + last
    path.unlink()


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    path.write_bytes(lines_of(make_record())[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RecordStore(tmp_path, Record, HASH) as store:
            store.append(make_record(tokens=64))
        assert [record.tokens for record in read_records(path, Record)] == [16, 64]


def test_damage_anywhere_else_is_an_error_that_names_the_line(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    good = lines_of(make_record())
    path.write_bytes(good + b'{"half": \n' + good)
    with pytest.raises(AttnZooError, match="line 2"):
        read_records(path, Record)
    path.write_bytes(good + b'{"another": "schema"}')
    with pytest.raises(AttnZooError, match="line 2"):
        read_records(path, Record)


@pytest.mark.parametrize("quality", [{"ratio": None}, {"note": "of another task"}])
def test_a_quality_where_a_task_has_none_is_an_error_that_names_the_line(tmp_path, make_record, quality):
    """A quality has a class of its own per task, and there is none of the base class."""
    path = tmp_path / "records.jsonl"
    row = {**json.loads(lines_of(make_record(kind="quality", cost=None))), "quality": quality}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(AttnZooError, match=r"line 1.*quality: .*hold no quality"):
        read_records(path, Envelope)


def test_the_latest_record_of_a_row_counts(tmp_path, make_record):
    (tmp_path / "r.jsonl").write_bytes(
        lines_of(make_record(status="failed", cost=None), make_record(tokens=64), make_record(status="ok"))
    )
    assert [(record.tokens, record.status) for record in read_records(tmp_path / "r.jsonl", Record)] == [
        (16, "ok"),
        (64, "ok"),
    ]


@pytest.mark.parametrize(
    ("status", "done"), [("ok", True), ("oom", True), ("unsupported", True), ("failed", False), ("timeout", False)]
)
def test_which_rows_a_resumed_run_measures_again(tmp_path, make_record, status, done):
    with RecordStore(tmp_path, Record, HASH) as store:
        store.append(make_record(status=status))
    with RecordStore(tmp_path, Record, HASH) as store:
        assert store.done(make_record().key) is done


def test_records_of_another_config_are_refused_and_fresh_sets_them_aside(tmp_path, make_record):
    with RecordStore(tmp_path, Record, HASH) as store:
        store.append(make_record())
    with pytest.raises(ConfigError, match=r"output=PATH.*fresh=true"), RecordStore(tmp_path, Record, "f" * 16):
        pass
    with RecordStore(tmp_path, Record, "f" * 16, fresh=True) as store:
        assert not store.records
    assert (tmp_path / "records.old.jsonl").exists()


@pytest.mark.parametrize("config", [HASH, "f" * 16], ids=["same config", "another"])
def test_rows_that_are_renewed_are_measured_again_where_what_they_depend_on_has_changed(tmp_path, make_record, config):
    """Such as the quality of what was trained on in the meantime: the config need not have changed for that."""
    before, other = make_record(measured="a" * 16), make_record(label="other", measured="b" * 16)
    with RecordStore(tmp_path, Record, HASH) as store:
        store.append(before)
        store.append(other)
    asked = {before.key: "c" * 16, other.key: "b" * 16}
    with RecordStore(tmp_path, Record, config, asked, renewed=set(asked)) as store:
        assert [store.done(key) for key in asked] == [False, True]
        store.append(before.model_copy(update={"measured": "c" * 16}))
    with RecordStore(tmp_path, Record, config, asked, renewed=set(asked)) as store:
        assert all(map(store.done, asked))
    if config != HASH:
        with (
            pytest.raises(ConfigError, match="records of another config"),
            RecordStore(tmp_path, Record, config, {before.key: "d" * 16}),
        ):
            pass


def test_a_second_run_in_the_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    code = (
        "import sys, pathlib; from attnzoo.bench.record import Record; from attnzoo.bench.store import RecordStore\n"
        f"with RecordStore(pathlib.Path({str(tmp_path)!r}), Record, {HASH!r}):\n"
        " print('in', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match="another run is writing"), RecordStore(tmp_path, Record, HASH):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RecordStore(tmp_path, Record, HASH):
        pass
