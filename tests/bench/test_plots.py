from types import SimpleNamespace

import pytest

from attnzoo.bench import plots
from attnzoo.tasks.decode.plots import _tall_figure


@pytest.mark.parametrize("length", [4, 17, 22, 30])
def test_the_key_of_a_plot_has_room_for_its_labels(length):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = plots.new_figure()
    for label in ("n" * length, "short"):
        axes.plot([0, 1], [0, 1], marker="o", label=label)
    plots.add_key(axes)
    FigureCanvasAgg(figure).draw()
    key, whole = axes.get_legend().get_window_extent(), figure.bbox
    assert key.x1 <= whole.x1
    assert axes.bbox.x1 <= key.x0
    assert axes.bbox.width > 0.35 * whole.width


@pytest.mark.parametrize("length", [4, 23, 34])
def test_the_names_left_of_intervals_are_whole(length):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = [(SimpleNamespace(label="n" * length), SimpleNamespace(cache_ratio=0.25))] * 2
    figure, axes = _tall_figure(rows)
    FigureCanvasAgg(figure).draw()
    assert all(name.get_window_extent().x0 >= 0 for name in axes.get_yticklabels())
    assert axes.bbox.width > 0.25 * figure.bbox.width
