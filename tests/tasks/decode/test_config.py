import pytest

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.config import validate_config


def written(**changes):
    return {"task": "decode", "name": "grid", "attentions": ["h2o", {"name": "tova", "label": "t"}], **changes}


SMALL = {"label": "small", "options": {"budget": 32, "block_size": 8}}
LARGE = {"label": "large", "options": {"budget": 64, "block_size": 8}}


def test_every_attention_is_measured_in_each_setting_of_the_grid():
    config = validate_config(written(grid=[SMALL, LARGE]))
    assert [a.label for a in config.attentions] == ["h2o small", "t small", "h2o large", "t large"]
    assert [a.options["budget"] for a in config.attentions] == [32, 32, 64, 64]
    again = validate_config(config.model_dump(mode="json"))  # as a record keeps it: the grid is in the attentions
    assert again.attentions == config.attentions


def test_an_attention_keeps_its_own_options_in_every_setting():
    own = {"name": "h2o", "label": "own", "options": {"block_size": 4}}
    (row,) = validate_config(written(attentions=[own], grid=[SMALL])).attentions
    assert row.options == {"budget": 32, "block_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [SMALL, SMALL]}, "h2o small"),
        ({"grid": [{"label": "x", "options": {"budgt": 3}}]}, "budgt"),
        ({"grid": [{"options": {"budget": 3}}]}, "grid.0.label"),
        ({"grid": [SMALL], "attentions": [{"name": "h20"}]}, "h2o"),
        ({"grid": [{"label": "p", "options": {"budget": 8, "schedule": "prompt"}}]}, "nll.scored"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate_config(written(**changes))
