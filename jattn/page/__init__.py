"""Pages of weights and of masks: one file each, for any browser, without a network.

All functions return a `Page`: `page.save("weights.html")` writes it, and a notebook shows
it. The page of a long text has the strongest weights of each query and sums of all
weights, so that it stays small and quick.

    `document`  one HTML file: its template, what is escaped, how it is saved
    `packing`   arrays as bytes, compressed, in letters
    `inputs`    layers, options and tokens, checked first
    `looks`     what one layer attends to, without its T × S weights
    `keeping`   which weights stay, so that the page has the size asked for
    `assembly`  facts and arrays of the pages of heads
    `blocks`    a mask's blocks, and the single pairs inside them
    `pages`     the pages themselves

The folder also has the templates: `.html`, `.css` and `.js` files, which `document` puts
into the page.
"""

from jattn.page.document import Page
from jattn.page.pages import entropy, mask, received, weights

__all__ = ["Page", "entropy", "mask", "received", "weights"]
