"""Arrays as they come in: their shapes, their integers, and the devices they lie on.

`shapes`        the letters B T S N K H D, and which shapes fit each other
`checks`        arrays as a caller gives them: checked and aligned
`positions`     where queries and keys stand, in int32
`integers`      the numbers and ids of masks: used in full, or refused with their name
`meshes`        arrays on several devices: what their types say, kept out of the rest
"""
