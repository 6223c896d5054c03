"""The pictures show the numbers they are given, and cut no label."""

import io
import subprocess
import sys

import numpy as np
import pytest

from jattn import plot
from jattn.masks import Causal, Window

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and"] * 7


def random_weights(*shape):
    return np.random.default_rng(0).dirichlet(np.ones(shape[-1]), size=shape[:-1])


def panels_of(figure):
    return [axis for axis in figure.axes if axis.images]


def labels_of(side):
    return [label.get_text() for label in side.get_ticklabels()]


def test_weights_draws_each_head_under_its_name():
    weights = random_weights(3, 5, 7)
    panels = panels_of(plot.weights(weights))
    assert [panel.get_title() for panel in panels] == ["head 0", "head 1", "head 2"]
    for panel, head in zip(panels, weights, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), head)


def test_weights_tells_examples_apart():
    panels = panels_of(plot.weights(random_weights(2, 2, 3, 3), heads=[1]))
    assert [panel.get_title() for panel in panels] == [
        "example 0, head 1",
        "example 1, head 1",
    ]


def test_weights_of_one_head_need_no_name():
    (panel,) = panels_of(plot.weights(random_weights(3, 3)))
    assert panel.get_title() == ""


def test_weights_draws_all_heads_in_one_stated_scale():
    figure = plot.weights(random_weights(2, 4, 4) * np.array([0.1, 1])[:, None, None])
    first, second = (panel.images[0].get_clim() for panel in panels_of(figure))
    assert first == second
    assert figure.axes[-1].get_ylabel() == "weight"


def test_weights_labels_queries_and_keys_with_their_tokens():
    weights = random_weights(2, 4)
    (panel,) = panels_of(
        plot.weights(weights, query_tokens=["q0", "q1"], key_tokens=list("abcd"))
    )
    assert labels_of(panel.yaxis) == ["q0", "q1"]
    assert labels_of(panel.xaxis) == list("abcd")
    assert panel.xaxis.get_ticks_position() == "top"


def test_tokens_of_the_queries_name_equally_many_keys():
    (panel,) = panels_of(plot.weights(random_weights(3, 3), query_tokens=list("abc")))
    assert labels_of(panel.xaxis) == list("abc")


def test_tokens_are_shown_in_printable_letters_and_not_as_formulas():
    tokens = ["$x$", "a\n", "incomprehensibilities"]
    figure = plot.weights(random_weights(3, 3), query_tokens=tokens)
    figure.savefig(io.BytesIO())
    (panel,) = panels_of(figure)
    assert labels_of(panel.xaxis) == ["$x$", "a\\n", "incomprehensibi…"]
    assert not any(label.get_parse_math() for label in panel.xaxis.get_ticklabels())


def test_more_than_64_tokens_are_pooled_and_the_picture_says_so():
    weights = random_weights(1, 130, 70)
    figure = plot.weights(weights, query_tokens=["x"] * 130)
    (panel,) = panels_of(figure)
    drawn = panel.images[0].get_array()
    assert drawn.shape == (44, 35)
    np.testing.assert_allclose(drawn.sum(-1), 1)
    assert "3 queries × 2 keys" in figure.get_supxlabel()
    assert labels_of(panel.yaxis)[1] == "15 x"


def test_more_than_sixteen_panels_are_left_out_and_the_picture_says_so():
    figure = plot.weights(random_weights(20, 2, 2))
    assert len(panels_of(figure)) == 16
    assert figure.get_supxlabel() == "the first 16 of 20 panels"


def test_weights_that_are_no_number_are_grey_and_the_picture_says_so():
    figure = plot.weights(np.full((2, 2), np.nan))
    assert figure.get_supxlabel() == "grey: not a number"


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 8, 8), WORDS[:8]),
        ((4, 12, 12), ["incomprehensibilities"] * 12),
        ((8, 64, 64), (WORDS)[:64]),
        ((2, 3, 2, 40), None),
        ((2, 300, 300), None),
        ((1, 65, 200), None),
        ((20, 3, 3), None),
        ((1, 300, 300), (WORDS * 5)[:300]),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_no_letter_is_cut_off(shape, words):
    tokens = {} if words is None else {"query_tokens": words, "key_tokens": words}
    figure = plot.weights(random_weights(*shape), title="A title " * 20, **tokens)
    assert_all_inside(figure)


@pytest.mark.parametrize("words", [WORDS[:8], None])
def test_a_title_of_several_lines_stays_above_the_panels(words):
    title = "A title " * 30
    figure = plot.weights(random_weights(2, 8, 8), query_tokens=words, title=title)
    figure.draw_without_rendering()
    (title,) = [text for text in figure.texts if text.get_text().startswith("A title")]
    below = figure.axes[0].title.get_window_extent()
    assert title.get_window_extent().y0 > below.y1


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (4, 40, 1), (2048, 2048, 128), (5, 900, None), (7, 1, 128)]
)
def test_no_letter_of_a_mask_is_cut_off(size):
    T, S, block = size
    assert_all_inside(plot.mask(Causal(), T, S, block=block, title="Causal() " * 9))


def assert_all_inside(figure):
    figure.draw_without_rendering()
    tight = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert tight.x0 >= -0.02
    assert tight.y0 >= -0.02
    assert tight.x1 <= width + 0.02
    assert tight.y1 <= height + 0.02


def test_picture_is_opaque_and_white_whatever_the_defaults():
    buffer = io.BytesIO()
    plot.mask(Causal(), 3).savefig(buffer, format="png")
    buffer.seek(0)
    image = pytest.importorskip("matplotlib.image").imread(buffer)
    np.testing.assert_array_equal(image[0, 0], 1)


def test_pictures_need_no_pyplot():
    code = "import sys, jattn.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mask_draws_each_pair():
    figure = plot.mask(Window(1, 0), 4, 5)
    expected = np.tril(np.ones((4, 5))) - np.tril(np.ones((4, 5)), -2)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), 2 * expected)
    assert legend_of(figure) == ["may attend", "may not"]


def test_mask_draws_blocks():
    figure = plot.mask(lambda b, n, t, s: t >= s, 6, block=2)
    expected = [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)
    assert legend_of(figure) == ["all may attend", "some may", "none may"]
    assert figure.legends[0].get_title().get_text() == "one cell: 2 queries × 2 keys"


def test_large_mask_is_drawn_in_blocks_by_itself():
    figure = plot.mask(np.ones((300, 200), bool), 300, 200)
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, np.full((100, 67), 2))


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_entropy_draws_means_by_layer_and_head():
    figure = plot.entropy([np.array([[1.0, 2], [3, 4]]), np.array([0.5])])
    (panel,) = panels_of(figure)
    drawn = np.ma.filled(panel.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(drawn, [[2, 3], [0.5, np.nan]])
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("layer", "head")
    assert [text.get_text() for text in panel.texts] == ["2.00", "3.00", ".50"]
    assert figure.axes[-1].get_ylabel() == "entropy (nats)"
    assert "grey: none" in figure.get_supxlabel()


def test_received_writes_each_token_on_its_colour():
    figure = plot.received(np.array([[0.0, 4], [1, 2]]), ["to", "be"], title="$x$")
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["$x$", "head 0", "to", "be", "head 1", "to", "be"]
    boxes = [patch.get_facecolor() for patch in figure.axes[0].patches]
    colours = plot_colours(np.array([0, 0.25, 1, 0.5]))
    np.testing.assert_allclose(boxes, colours)
    assert figure.axes[1].get_ylabel() == "received"
    assert figure.axes[1].get_ylim() == (0, 4)


def plot_colours(shares):
    return pytest.importorskip("matplotlib").colormaps["BuPu"](shares)


def test_received_without_tokens_or_with_too_many_is_rows_of_cells():
    received = np.arange(260.0).reshape(130, 2)
    (panel,) = panels_of(plot.received(received))
    expected = [received[i : i + 3].mean(0) for i in range(0, 130, 3)]
    np.testing.assert_allclose(panel.images[0].get_array(), np.transpose(expected))
    assert labels_of(panel.yaxis) == ["head 0", "head 1"]
    figure = plot.received(np.ones((3000, 16)), ["word"] * 3000)
    assert figure.get_supxlabel() == "one cell: mean of 47 keys"


@pytest.mark.parametrize("heads", [None, 1, 12])
@pytest.mark.parametrize(
    "words", [WORDS[:1], WORDS, ["incomprehensibilities" * 2] * 9, None]
)
def test_no_letter_of_received_is_cut_off(heads, words):
    shape = (len(words or WORDS),) if heads is None else (len(words or WORDS), heads)
    assert_all_inside(plot.received(np.ones(shape), words, title="A title " * 20))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (48, 2), (6, 8)])
def test_no_letter_of_entropy_is_cut_off(shape):
    assert_all_inside(plot.entropy(np.ones(shape), title="A title " * 9))


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: plot.weights(np.ones(3)), r"must be BNTS, NTS or TS .* got shape \(3,\)"),
        (lambda: plot.weights(np.ones((2, 0))), "no axis of size 0"),
        (lambda: plot.weights(np.ones((2, 3, 3)), heads=[2]), r"N=2 heads, .*, got \[2\]"),
        (lambda: plot.weights(np.ones((3, 3)), heads=[]), r"N=1 heads, .*, got \[\]"),
        (
            lambda: plot.weights(np.ones((2, 3, 3)), heads=[1.5]),
            r"whole numbers, got \[1.5",
        ),
        (lambda: plot.weights(np.ones((2, 3, 3)), heads=[True]), "whole numbers, got"),
        (lambda: plot.weights(np.ones((2, 3, 3)), heads="1"), "whole numbers, got '1'"),
        (lambda: plot.weights(np.ones((3, 3)), query_tokens="abc"), "got one string"),
        (
            lambda: plot.weights(np.ones((2, 3)), query_tokens=["a"]),
            "`query_tokens` must have T=2 tokens, got 1",
        ),
        (
            lambda: plot.weights(np.ones((2, 3)), key_tokens=["a"]),
            "`key_tokens` must have S=3 tokens, got 1",
        ),
        (
            lambda: plot.mask(Causal(), 0),
            "`length` must be a whole number, at least 1, got 0",
        ),
        (lambda: plot.mask(Causal(), 4.5), "plot.mask: `length` must .* got 4.5"),
        (lambda: plot.mask(Causal(), 4, True), "`key_length` must .* got True"),
        (lambda: plot.mask(Causal(), 4, block=2.5), "`block` must be a whole number"),
        (lambda: plot.mask(np.ones((2, 2), bool), 3), "must broadcast to"),
    ],
)
def test_what_does_not_fit_is_refused(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()
