import pytest

from tests.tasks.detect.runs import as_it_is


@pytest.fixture(scope="session", autouse=True)
def configs_as_they_are():
    """Let mmengine save configs without yapf's layout, which takes longer than the training of a small detector.

    It lays one out anew at every checkpoint. What the documentation's commands save is laid out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", as_it_is)
        yield
