"""What every other folder builds on.

files         files written whole or not at all; strict JSON
schemas       JSON Schema, and its errors in words
checkpoints   checkpoints of this project, and weights from elsewhere
instructions  precision and memory layout that a CPU is fast in
ranks         the processes of a run, devices, precision
messages      printing, progress bars, the logger
errors        how a script ends on an error
signals       SIGTERM and Ctrl-C
versions      versions of Python, packages and this project
"""
