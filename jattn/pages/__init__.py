"""The parts of `jattn.page`, which turns arrays into one file that a browser opens.

`document`  one HTML file: its template, what is escaped, how it is saved
`packing`   arrays as bytes, compressed, in letters
`inputs`    layers, options and tokens, checked first
`looks`     what one layer attends to, without its T × S weights
`keeping`   which weights stay, so that the page has the size asked for
`assembly`  facts and arrays of the pages of heads
`blocks`    a mask's blocks, and the single pairs inside them

The folder also has the templates: `.html`, `.css` and `.js` files, which `document` puts
into the page.
"""
