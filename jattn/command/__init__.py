"""The parts of `python -m jattn`: each prints to stdout and returns an exit code.

`expression`    masks written as text
`refusal`       the message of a command that cannot run
`files`         reading and writing files without losing any
`check`         every implementation against the definition
`timing`        how long a call takes
`attend`        attention of arrays in files
`mask`          a mask, drawn
`welcome`       what is printed without arguments
"""
