import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from attnzoo import tasks
from attnzoo.bench.config import parse_override, read_yaml, without_stale_labels
from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.config import DecodeConfig, paired_labels
from attnzoo.tasks.operations import config as operations
from attnzoo.tasks.suite import SuiteConfig, load_config, validate_config

CONFIGS = Path(__file__).parents[2] / "configs" / "bench"
QUICKSTART = CONFIGS / "quickstart.yaml"
SMALL = {"name": "small", "attentions": ["softmax"]}


def problems_of(data):
    with pytest.raises(ConfigError) as caught:
        validate_config(data)
    return str(caught.value)


def test_the_config_of_the_first_page_is_valid_and_names_six_attentions_and_three_token_counts():
    config = load_config(QUICKSTART)
    assert [a.label for a in config.attentions] == [
        "softmax",
        "sdpa",
        "flash",
        "padre degree=1",
        "padre degree=2",
        "padre degree=3",
    ]
    assert config.cost.tokens == (196, 784, 3136)
    assert config.folder == Path("runs/quickstart")


def test_an_unknown_key_names_the_nearest_and_where():
    said = problems_of({**SMALL, "cost": {"tokns": [16]}})
    assert "cost.tokns: unknown key; did you mean 'tokens'?" in said


def test_an_unknown_key_with_no_neighbor_lists_what_is_known():
    assert re.search(
        r"quality\.recipe\.zzz: unknown key; known: .*epochs", problems_of({**SMALL, "quality": {"recipe": {"zzz": 1}}})
    )


def test_a_bad_value_names_the_key_the_value_and_what_is_allowed():
    said = problems_of({**SMALL, "cost": {"dtype": "float8", "repeats": 0}})
    assert "cost.dtype: 'float8' is not allowed" in said
    assert "'float32', 'bfloat16' or 'float16'" in said
    assert "cost.repeats: 0 is not allowed" in said


def test_all_problems_come_together_names_of_attentions_included():
    said = problems_of(
        {"nam": "x", "attentions": ["sofmax", {"name": "padre", "options": {"degre": 2}}], "device": "tpu"}
    )
    for part in (
        "nam: unknown key",
        "name: must be given",
        "device: 'tpu'",
        "sofmax",
        "'softmax'",
        "degre",
        "5 errors",
    ):
        assert part in said


def test_an_option_value_that_a_method_refuses_is_found_before_any_work():
    assert "attentions.0.options" in problems_of({**SMALL, "attentions": [{"name": "padre", "options": {"degree": 0}}]})


@pytest.mark.parametrize("tokens", [[15], [16, 16], [], [0], [-4], ["a"]])
def test_token_counts_are_distinct_squares(tokens):
    assert "cost" in problems_of({**SMALL, "cost": {"tokens": tokens}})


def test_one_batch_stands_for_all_token_counts_and_a_mapping_must_name_each():
    one = validate_config({**SMALL, "cost": {"tokens": [16, 64], "batch": 2}})
    each = validate_config({**SMALL, "cost": {"tokens": [16, 64], "batch": {16: 2, 64: 2}}})
    assert one.cost.batch == {16: 2, 64: 2}
    assert one.hash == each.hash
    said = problems_of({**SMALL, "cost": {"tokens": [16, 64], "batch": {16: 2, 9: 1}}})
    assert "no batch for token counts [64]" in said
    assert "[9] are not among" in said


def test_sizes_of_images_are_given_once():
    both = {"tokens": [16], "image_sizes": [64]}
    assert "give either tokens, or image_sizes" in problems_of({**SMALL, "cost": both})
    assert "has a size twice" in problems_of({**SMALL, "cost": {"image_sizes": [64, 64]}})
    assert "give either cost, or costs" in problems_of({**SMALL, "cost": {"tokens": [16]}, "costs": [{"batch": 2}]})
    assert "costs.1.dtype" in problems_of({**SMALL, "costs": [{"batch": 2}, {"dtype": "float8"}]})


def test_labels_must_differ():
    assert "['softmax']" in problems_of({**SMALL, "attentions": ["softmax", "softmax"]})
    assert "['dense']" in problems_of({**SMALL, "attentions": [{"name": "softmax", "label": "dense"}]})


def test_the_image_size_is_not_the_hosts_to_set():
    assert "the token counts decide it" in problems_of({**SMALL, "model": {"options": {"img_size": 32}}})


def test_names_of_before_are_taken_but_not_beside_the_new_ones():
    before, now = (
        {"model": "vit_small_patch16_224", "patch_size": 8},
        {"name": "vit_small_patch16_224", "patch_size": 8},
    )
    old = validate_config({**SMALL, "host": before, "quality": {"host": before}})
    new = validate_config({**SMALL, "model": now, "quality": {"model": now}})
    assert (old, old.hash) == (new, new.hash)
    assert new.model.name == "vit_small_patch16_224"
    assert "host is called model now: give model alone" in problems_of({**SMALL, "host": before, "model": now})


def test_the_hash_is_over_content_and_not_over_where_it_is_written():
    plain = validate_config(SMALL)
    assert plain.hash == validate_config({**SMALL, "output": "elsewhere", "fresh": True}).hash
    assert plain.hash == validate_config({**SMALL, "seed": 0}).hash, "a default written out changes nothing"
    assert plain.hash != validate_config({**SMALL, "seed": 1}).hash
    assert plain.hash != validate_config({**SMALL, "attentions": ["sdpa"]}).hash


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(QUICKSTART, ["cost.batch=2", "quality.seeds=[0, 1]"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml") == config


def test_overrides_reach_into_sections_lists_and_null():
    config = load_config(
        QUICKSTART, ["cost.tokens=[16]", "attentions.3.options.degree=4", "quality=null", "quality.recipe.epochs=9"]
    )
    assert config.cost.tokens == (16,)
    assert config.attentions[3].label == "padre degree=4"
    assert config.quality is not None
    assert config.quality.recipe.epochs == 9


def test_an_override_of_the_place_after_a_list_adds_to_it():
    before = load_config(QUICKSTART).attentions
    config = load_config(QUICKSTART, [f"attentions.{len(before)}=hyena", f"attentions.{len(before) + 1}.name=sima"])
    assert config.attentions[:-2] == before
    assert [one.name for one in config.attentions[-2:]] == ["hyena", "sima"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("cost..tokens=3", "key=value"),
        ("seed=[1", "not valid YAML"),
        ("name.x=1", "has no keys inside"),
        ("attentions.17.name=sdpa", "'17' is not an index: 6 adds to its end"),
        ("attentions.first.name=sdpa", "not an index"),
        ("attentions.\u00b2.name=sdpa", "not an index"),
        ("cost.tokns=[16]", "did you mean 'tokens'"),
    ],
)
def test_a_bad_override_is_refused_by_name(override, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(QUICKSTART, [override])


KEYS = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text("abcXYZ =.,:#'\"[]{}-", max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E+3", -2e3), ("1.5e3", 1.5e3), ("[.1e1]", [1.0]), ("'1e-4'", "1e-4"), ("1e", "1e")],
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    """YAML 1.1 takes them for text where they have no point."""
    (_, read) = parse_override(f"lr={text}")
    assert (type(read), read) == (type(value), value)


@given(KEYS, VALUES)
def test_an_override_written_as_yaml_reads_back(keys, value):
    text = f"{'.'.join(keys)}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
    assert parse_override(text) == (keys, value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n", "expected a mapping"), ("a: [", "not valid YAML"), ("name: a\nname: b\n", "'name' appears twice")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_schema_survives_a_dump():
    config = load_config(QUICKSTART)
    assert SuiteConfig.model_validate_json(config.model_dump_json()) == config


def test_importing_attnzoo_imports_no_benchmark_and_no_optional_package():
    code = """
import sys, attnzoo
optional = {"attnzoo.bench", "attnzoo.tasks", "pydantic", "yaml", "rich", "timm", "matplotlib"}
assert not optional & set(sys.modules), optional & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_comes_with_the_install_line():
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "yaml" else real(name, *more)
from attnzoo.errors import MissingExtraError
try:
    import attnzoo.bench
except MissingExtraError as error:
    assert "pip install -e '.[vision]'" in str(error), error
else:
    raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_repository_are_sound(path):
    assert tasks.load(path)[1].name == path.stem.replace("_", "-")


def test_a_row_is_not_called_by_options_that_were_overridden(tmp_path):
    row = {"name": "padre", "options": {"degree": 2}, "label": "padre of degree 2"}
    (path := tmp_path / "c.yaml").write_text(yaml.safe_dump({"name": "c", "attentions": ["sdpa", row]}))

    def label(*overrides):
        return load_config(path, overrides).attentions[1].label

    assert label() == label("cost.repeats=5") == "padre of degree 2"
    assert label("attentions.1.options.degree=3") == "padre degree=3"
    assert label("attentions.1.options={kernel_size: 5}") == "padre kernel_size=5"
    assert label("attentions.1.name=conv", "attentions.1.options={}") == "conv"
    assert label("attentions.1.options.degree=3", "attentions.1.label=mine") == "mine"


BOUNDED = {"budget": 1024, "base": "tova", "base_options": {"normalize": False}}


@pytest.mark.parametrize(
    ("label", "override", "kept"),
    [
        ("h2o", "options.budget=0.25", True),
        ("the one of old", "options.budget=0.25", True),
        ("a row", "name=vatp", True),
        ("h2o v10240", "options.budget=64", True),
        ("h2o 1024", "options.budget=64", False),
        ("h2o 1024, as sums", "options.budget=64", False),
        ("h2o, budget of 2**10", "options.budget=64", False),
        ("h2o over tova", "options.base=snapkv", False),
        ("h2o over tova", "options.sink=3", True),
        ("h2o recent=2", "options.recent=3", False),
        ("h2o as sums", "options.base_options.normalize=true", False),
        ("h2o", "options.base_options.normalize=true", True),
        ("h2o over", "name=caote", False),
        ("h2o, mine", "options={budget: 64}", False),
        ("mine of 1024", "options={budget: 64, base: tova}", False),
    ],
)
def test_a_label_of_the_file_stays_unless_it_tells_what_an_override_changed(tmp_path, label, override, kept):
    path = tmp_path / "c.yaml"
    row = {"name": "h2o", "options": BOUNDED, "label": label}
    path.write_text(yaml.safe_dump({"attentions": ["keydiff", row]}))
    override = f"attentions.1.{override}"
    changed = without_stale_labels(read_yaml(path, [override]), read_yaml(path), [override])["attentions"][1]
    assert changed.get("label") == (label if kept else None)


def test_pairs_find_the_rows_of_a_file_whose_options_were_overridden(tmp_path):
    rows = [{"name": name, "label": name, "options": {"budget": 16, "block_size": 8}} for name in ("h2o", "caote")]
    content = {"task": "decode", "name": "x", "attentions": rows, "pairs": [["h2o", "caote"]]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    config = DecodeConfig.load(tmp_path / "c.yaml", ["attentions.0.options.budget=0.25"])
    assert [attention.label for attention in config.attentions] == ["h2o", "caote"]
    assert paired_labels(config.pairs, [attention.label for attention in config.attentions]) == [("h2o", "caote")]


def test_one_wrong_key_is_one_error():
    said = problems_of({**SMALL, "cost": {"tokens": 196}})
    assert "1 error" in said
    assert "cost.tokens: 196 is not allowed; must be a list" in said


def test_what_no_type_of_several_fits_is_one_line_with_all_reasons():
    said = problems_of({**SMALL, "cost": {"image_sizes": [64], "batch": -1}})
    assert "1 error" in said
    assert "cost.batch: -1 is not allowed; input should be greater than 0, or must be a mapping" in said


def test_values_of_a_wrong_kind_are_told_in_words():
    said = problems_of({**SMALL, "name": "a b", "attentions": [3, {"name": "sdpa", "where": 3}]})
    assert "name: 'a b' is not allowed; must begin with a letter or digit and go on with these and . _ -" in said
    assert "attentions.0: 3 is not allowed; must be a mapping" in said
    assert "attentions.1.where: 3 is not allowed" in said


def test_keys_of_images_are_refused_for_language():
    said = problems_of(
        {**SMALL, "language": {"attentions": [{"name": "tova", "options": {"budget": 9}, "tokens": [9]}]}}
    )
    assert "attentions.0.tokens is for vision models" in said


def test_a_file_that_is_no_text_is_a_sentence(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"PK\x03\x04\xff\xfe")
    for load in (load_config, operations.load_config):
        with pytest.raises(ConfigError, match=r"weights.bin' is not UTF-8 text, so not YAML"):
            load(tmp_path / "weights.bin")
