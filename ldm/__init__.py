"""The shelf of the project: data sets, transforms, networks' plumbing, diffusion. No module here parses
arguments.

Imports inside the package run one way, towards `transforms`, `datasets` and `checkpoints`; nothing here
imports
`utils`.
"""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, in which file or key, and what to do.

    Scripts end on it with the message and exit code 2, never with a traceback. Whatever else is raised is a
    defect of the program and keeps its traceback.
    """
