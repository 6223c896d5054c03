"""Pages in a real browser: mouse, fingers, keyboard, light and dark, a phone's width."""

import re

import numpy as np
import pytest

import jattn
from jattn import page
from jattn.masks import Causal, Window
from tests.browser import needs_browser, opened
from tests.helpers.draws import normal
from tests.test_page import long_page

pytestmark = needs_browser

WORDS = [
    *["the", "cat", "sat", "on", "the", "mat", "because", "the", "cat", "was"],
    "<script>alert(1)</script>",
]


PIECES = ["Ġthe", "Ġcat", "s", "Ċ", "▁a", "", "\x07", " "]


@pytest.fixture(scope="module")
def weights():
    """Layers × heads × T × S, and the page of them."""
    T = len(WORDS)
    query, key = 2 * normal(3, (2, 3, T, 4, 8))
    layers = list(query), list(key)
    made = page.weights(*layers, WORDS, mask=Causal(), title="a & b")
    exact = [jattn.attention_weights(*x, mask=Causal()) for x in zip(*layers, strict=True)]
    return np.array(exact), made


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    pages = {
        "weights": weights[1],
        "pieces": page.received(np.ones(8), PIECES),
        "received": page.received(np.arange(22.0).reshape(11, 2), WORDS),
        "entropy": page.entropy([[3.0, 1.5], [0.5, 2.0]]),
        "mask": page.mask(Causal() & Window(60, 0), 200, block=32),
    }
    for name, made in pages.items():
        made.save(folder / f"{name}.html")
    return folder


@pytest.fixture(scope="module")
def browser():
    with opened() as tab:
        yield tab


@pytest.fixture
def tab(browser, files):
    browser.errors.clear()
    browser.open(files / "weights.html")
    yield browser
    assert browser.errors == []


def listed(tab, which):
    """The tokens of a list in the panel, with their numbers."""
    found = tab.js(
        "[...document.querySelectorAll('#panel .lists > div')].map((list) => "
        "[...list.querySelectorAll('.found button')].map((x) => "
        "[x.querySelector('small').textContent, x.querySelector('.amount').textContent]))"
    )
    return {int(at): amount for at, amount in found[which]}


PLACE = "document.querySelector('#{}')"
PANEL = "document.querySelector('#panel').textContent"


def percent(text):
    return float(re.sub("[^0-9.]", "", text)) / 100


def slot_of(layer, head):
    return f".cell[value='{5 * layer + head}']"


def test_hovering_shows_what_a_token_attends_to_and_what_attends_to_it(tab, weights):
    exact, _ = weights
    tab.click(slot_of(1, 2))
    tab.hover("#both-6")
    for which, expected in ((0, exact[1, 2, 6]), (1, exact[1, 2, :, 6])):
        found = listed(tab, which)
        strongest = np.argsort(-expected)[:3]
        assert list(found)[:3] == list(strongest)
        for at, amount in found.items():
            assert abs(percent(amount) - expected[at]) < 0.0051
    assert tab.js("document.querySelector('#both-6').matches('.active')")
    assert tab.js("document.querySelectorAll('.token.out').length") > 3
    assert tab.js("document.querySelectorAll('#curves path').length") > 3
    tab.hover("#title")
    assert tab.js("document.querySelectorAll('.token.out, .token.active').length") == 0


def test_the_mean_of_a_layer_and_of_several_heads_are_means(tab, weights):
    exact, _ = weights
    tab.click(slot_of(2, 4))
    tab.click("#both-9")
    assert "mean of all heads" in tab.js("document.querySelector('#chosen').textContent")
    mean = exact[2, :, 9].mean(0)
    assert abs(percent(listed(tab, 0)[int(mean.argmax())]) - mean.max()) < 0.0051
    tab.click(slot_of(0, 0))
    tab.click(slot_of(2, 3), "Control")
    assert tab.js("document.querySelectorAll('[aria-selected=true].cell').length") == 2
    mean = (exact[0, 0, 9] + exact[2, 3, 9]) / 2
    assert abs(percent(listed(tab, 0)[int(mean.argmax())]) - mean.max()) < 0.0051


def test_a_pressed_token_stays_and_a_second_one_is_compared_in_all_heads(tab, weights):
    exact, _ = weights
    tab.click("#both-8")
    tab.hover("#both-3")
    heads = tab.js("document.querySelector('.pair .found').textContent")
    layer, head = np.unravel_index(exact[:, :, 8, 3].argmax(), (3, 4))
    assert heads.startswith(f"layer {layer}, head {head}: ")
    tab.click("#shows button[value=pair]")
    tab.hover("#both-3")
    name = tab.js(f'document.querySelector("{slot_of(layer, head)}").ariaLabel')
    assert abs(percent(name.partition(":")[2]) - exact[layer, head, 8, 3]) < 0.0051
    tab.press("Escape")
    assert tab.js("document.querySelectorAll('.token.active').length") == 0


def test_pointing_at_a_list_moves_nothing_and_compares(tab):
    tab.click("#both-8")
    listing = ".lists > div:nth-child(2) .found"
    others = f"[...document.querySelectorAll('{listing} small')].map((x) => x.textContent)"
    found = tab.js(others)
    place = next(i for i, at in enumerate(found) if at != "8")  # not the token itself
    entry = f"{listing} li:nth-child({place + 1}) button"
    before = tab.middle(entry)
    tab.hover(entry)
    assert tab.js("document.querySelector('.token.other').id") == f"both-{found[place]}"
    assert tab.middle(entry) == before
    tab.click(entry)
    assert tab.js("document.activeElement.matches('.found button')")
    assert tab.js("document.querySelector('.token.active').id") == "both-8"


def test_the_keyboard_reaches_everything(tab):
    reached = []
    for _ in range(12):
        tab.press("Tab")
        reached.append(tab.js("document.activeElement.id || document.activeElement.value"))
    assert reached[:4] == ["theme", "pictures", "4", "several"]
    assert {"received", "lines-on", "tokens-both"} <= set(reached)
    tab.js("document.querySelector('.cell[tabindex=\"0\"]').focus()")
    tab.press("ArrowDown")
    tab.press("ArrowLeft")
    assert tab.js("document.querySelector('#chosen').textContent") == "Layer 1, head 3"
    tab.js("document.querySelector('#tokens-both').focus()")
    for key in ("ArrowRight", "ArrowRight"):
        tab.press(key)
    assert tab.js("document.querySelector('.token.active').id") == "both-2"
    assert tab.js(
        "document.querySelector('#tokens-both').ariaActiveDescendantElement.id"
    ) == ("both-2")
    tab.wait("document.querySelector('#said').textContent.startsWith('sat, token 2.')")
    tab.press("End")
    assert tab.js("document.querySelector('.token.active').id") == "both-10"


def test_everything_that_can_be_pressed_has_a_name(tab):
    nameless = (
        "[...document.querySelectorAll('button, input, [tabindex], [role]')].filter((x) => "
        "!(x.ariaLabel || x.textContent.trim() || x.labels?.length || "
        "['row', 'status', 'columnheader'].includes(x.role))).map((x) => x.outerHTML)"
    )
    assert tab.js(nameless) == []
    small = (
        "[...document.querySelectorAll('.cell')].filter((x) => x.offsetWidth < 20).length"
    )
    assert tab.js(small) == 0


def test_tokens_and_titles_are_written_as_text(tab):
    assert tab.js("document.querySelector('#both-10').textContent") == WORDS[-1]
    assert tab.js("document.querySelector('#title').textContent") == "a & b"
    assert tab.js("document.scripts.length") == 2  # numbers are gone


def test_marks_of_tokenizers_are_written_as_spaces_and_what_has_no_letter_as_a_sign(
    browser, files
):
    browser.open(files / "pieces.html")
    tokens = "[...document.querySelectorAll('.token')].map((x) => x.textContent)"
    assert browser.js(tokens) == ["the", "cat", "s", "⏎", "a", "∅", "\\x07", "␣"]
    text = browser.js("document.querySelector('.tokens').innerText").split("\n")
    assert text == ["the cats⏎", "a∅\\x07 ␣"]


def test_colours_are_those_of_the_system_until_the_switch_is_pressed(tab, files):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.js(paper)
    tab.prefer("dark")
    dark = tab.js(paper)
    assert light == "rgb(255, 255, 255)"
    assert max(map(int, re.findall(r"\d+", dark))) < 64
    tab.click("#theme")
    assert tab.js(paper) == light
    assert tab.js("document.querySelector('#theme').ariaLabel") == "Dark colours"
    tab.open(files / "weights.html", dark=True)
    assert tab.js(paper) == light  # it is remembered
    tab.js("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
def test_letters_can_be_read_on_every_colour(tab, files, dark):
    tab.open(files / "weights.html", dark=dark)
    tab.click("#both-8")
    colours = tab.js(
        "[...document.querySelectorAll('.token')].map((x) => "
        "[getComputedStyle(x).backgroundColor, getComputedStyle(x).color])"
    )
    paper = tab.js("getComputedStyle(document.body).backgroundColor")
    assert min(contrast(ink, back, paper) for back, ink in colours) > 4.5  # WCAG's AA


def contrast(ink, back, paper):
    def channels(text):
        numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", text)]
        scale = 1 if text.startswith("color(") else 255
        return np.array(numbers[:3]) / scale, numbers[3] if len(numbers) > 3 else 1.0

    def light(colour):
        linear = np.where(
            colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    (back, share), (paper, _), (ink, _) = map(channels, (back, paper, ink))
    both = sorted([light(ink), light(share * back + (1 - share) * paper)])
    return (both[1] + 0.05) / (both[0] + 0.05)


def test_on_a_phone_a_tap_chooses_and_nothing_is_wider_than_the_window(tab, files):
    tab.open(files / "weights.html", 360, 740, touch=True)
    assert tab.js("document.documentElement.scrollWidth") <= 360
    tab.tap("#both-9")
    assert tab.js("document.querySelector('.token.active').id") == "both-9"
    token, panel = (
        tab.js(f"(({{top, bottom}}) => [top, bottom])({name}.getBoundingClientRect())")
        for name in (
            "document.querySelector('#both-9')",
            "document.querySelector('#panel')",
        )
    )
    assert token[1] <= panel[0] + 1  # the panel does not cover it
    assert tab.js("document.documentElement.scrollWidth") <= 360
    tab.tap("#both-9")
    assert tab.js("document.querySelectorAll('.token.active').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_pages_of_received_and_entropy_show_their_numbers(browser, files, dark):
    browser.open(files / "received.html", dark=dark)
    browser.click("#both-4")
    assert "receives 8.50" in browser.js(PANEL)
    browser.click(".cell[value='1']")
    assert "receives 9.00" in browser.js(PANEL)
    browser.open(files / "entropy.html", dark=dark)
    cells = "[...document.querySelectorAll('.cell:not(.mean)')].map((x) => x.textContent)"
    assert browser.js(cells) == ["3.0", "1.5", "0.5", "2.0"]
    browser.click(".cell[value='3']")
    assert "spreads over 1.65 keys" in browser.js(
        "document.querySelector('#panel').textContent"
    )
    assert browser.errors == []


def test_a_mask_is_read_pair_by_pair_with_mouse_and_keyboard(browser, files):
    browser.open(files / "mask.html")
    browser.js("document.querySelector('#pairs').focus()")
    read = "document.querySelector('#read').textContent"
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        browser.press(key)
    assert browser.js(read).startswith("Query 2 may attend to key 0. Block 0, 0 is partial")
    browser.press("ArrowRight", "Shift")
    assert (
        browser.js(read)
        == "Query 2 may not attend to key 32. Block 0, 1 is empty: it is skipped."
    )
    browser.hover("#pairs")
    query, key = map(int, re.findall(r"(?:Query|key) (\d+)", browser.js(read)))
    assert ("may not" in browser.js(read)) == (not 0 <= query - key <= 60)
    before = picture_of(browser)
    browser.click("#closer")
    browser.wait(f"({PICTURE}) !== {before!r}")
    browser.click("#whole")
    browser.wait(f"({PICTURE}) === {before!r}")
    browser.prefer("dark")
    browser.wait(f"({PICTURE}) !== {before!r}")
    assert browser.errors == []


@pytest.mark.parametrize("width", [1280, 360])
def test_weights_near_zero_fit_into_the_panel(browser, tmp_path, width):
    query, key = normal(3, (2, len(WORDS), 1, 8))
    page.weights(query, key, WORDS, scale=1.5).save(tmp_path / "sharp.html")
    browser.open(tmp_path / "sharp.html", width, 800)
    browser.click("#both-8")
    assert "< 0.01" in browser.js(PANEL)
    wider = "[...document.querySelectorAll('#panel, .amount')].filter((x) => "
    assert browser.js(f"{wider} x.scrollWidth > x.clientWidth).length") == 0


@pytest.mark.slow
def test_a_page_of_4000_tokens_follows_the_pointer(browser, tmp_path, monkeypatch):
    long_page(monkeypatch, 4000, 30, 9, 1e7).save(tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    took = browser.js(
        "(() => { const took = []; const all = [...document.querySelectorAll('.token')];"
        "const event = () => new PointerEvent('pointerover', "
        "{bubbles: true, pointerType: 'mouse'});"
        "for (let i = 0; i < 61; i++) { const from = performance.now();"
        "all[(67 * i) % all.length].dispatchEvent(event()); document.body.offsetHeight;"
        "took.push(performance.now() - from); } return took.sort((x, y) => x - y); })()"
    )
    assert took[30] < 50  # ms, layout included: 3 were measured on a busy machine
    assert browser.errors == []


# A short sum over the picture: enough to tell two of them apart.
PICTURE = (
    "(() => { const c = document.querySelector('#pairs'); const d = "
    "c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let sum = 0; "
    "for (let i = 0; i < d.length; i += 97) sum = (sum * 31 + d[i]) % 1000003; "
    "return sum; })()"
)


def picture_of(tab):
    return tab.js(PICTURE)
