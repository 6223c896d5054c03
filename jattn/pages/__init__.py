"""The parts of `jattn.page`: from arrays to one file that a browser opens.

`document`  one HTML file: its template, what is escaped, how it is saved
`packing`   arrays as bytes, compressed, in letters
`inputs`    layers, options and tokens, checked at the door
`looks`     what one layer attends to, without its T × S weights
`keeping`   which weights stay, so that the page has the size asked for
`assembly`  facts and arrays of the pages of heads
`blocks`    a mask's blocks, and the single pairs inside them

Beside them lie the templates: `.html` and `.css` as they are read, and `.js` in the order
in which `document` puts them into the page.
"""
