import hashlib

import pytest


@pytest.fixture(scope="session")
def text():
    from attnzoo.tasks.decode.text import Text
    from tests.tasks.decode import llm

    prose = llm.prose()
    return Text("prose", prose, hashlib.sha256(prose.encode()).hexdigest())


@pytest.fixture(scope="session")
def tokenizer():
    from tests.tasks.decode import llm

    return llm.tokenizer()


@pytest.fixture
def model():
    from tests.tasks.decode import llm

    return llm.tiny_llama()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a tiny model and tokenizer, and the path of a text file."""
    from tests.tasks.decode import llm

    folder = tmp_path_factory.mktemp("llm")
    (folder / "prose.txt").write_text(llm.prose(), encoding="utf-8")
    return llm.save(folder / "model"), folder / "prose.txt"
