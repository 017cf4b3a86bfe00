"""American spelling and the field's words, in code, messages, configs and docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BRITISH = re.compile(
    r"\b\w*(?:colour|honour|neighbour|behaviour|favour|artefact|labell|catalogue|licence)\w*"
    r"|\b(?:grey|centre[sd]?|learnt)\b|\b\w*(?:normal|initial|standard|summar|token|quant|optim|general|final)is(?:e[drs]?|ing|ation)\b",
    re.IGNORECASE,
)
UNUSUAL = re.compile(
    r"perceptron|(?:nats|milliseconds|ms|entries|once|images|bytes) a (?:token|head|second|step|row)\b"
)
ALLOWED = {
    ("attnzoo/eviction/keydiff.py", "normalised"),  # the former spelling of an option, which is still taken
    ("configs/detect/small_dab_detr.py", "perceptron"),  # a key of the config, which its identity hangs on
}


def found(pattern: re.Pattern[str]) -> set[tuple[str, str]]:
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for folder in ("attnzoo", "eval", "train", "configs"):
        kinds = (".py", ".yaml", ".jinja", ".cpp", ".hpp")
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in kinds]
    return {
        (str(file.relative_to(ROOT)), match.group().lower())
        for file in files
        for match in pattern.finditer(file.read_text(encoding="utf-8"))
    } - ALLOWED


def test_spelling_is_american():
    assert BRITISH.search("normalised colours")
    assert found(BRITISH) == set()


def test_words_are_the_fields():
    assert UNUSUAL.search("0.1 nats a token")
    assert found(UNUSUAL) == set()
