"""Masks and weights as small arrays, as text, and as figures.

`given`         numbers, heads, tokens and lengths, checked
`numbers`       masks and weights as small arrays
`shades`        numbers as shades and bars, for a terminal
`panels`        empty panels for pictures
`colours`       colours in panels, and what they mean
`words`         a text as a picture
"""
