"""One module a command, thin: parse, call, render.

`root` has the commands, `guard` the exit statuses, `options` what several commands share,
`output` the one way to stdout and stderr. Only `output` and `guard` print.
"""
