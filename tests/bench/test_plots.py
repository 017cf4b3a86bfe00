import pytest

from attnzoo.bench import plots


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
@pytest.mark.parametrize("fontsize", [7, 10])
def test_names_left_of_a_plot_are_whole(length, fontsize):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = plots.new_figure()
    plots.name_rows(axes, ["n" * length, "short"], least=0.34, fontsize=fontsize)
    FigureCanvasAgg(figure).draw()
    assert all(name.get_window_extent().x0 >= 0 for name in axes.get_yticklabels())
    assert axes.bbox.width > 0.25 * figure.bbox.width
