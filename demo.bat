@echo off
rem Train on simulated brains and generate new ones; needs only Python 3.11 or newer.
rem
rem   demo.bat               makes .venv on the first run, then outputs\demo
rem   demo.bat --data DIR    the same with the volumes in DIR
rem   demo.bat --help        all options
rem
rem The variable PYTHON names the Python to use. The steps are in launchers\demo.py.
setlocal
call "%~dp0launchers\find_python.bat"
if %errorlevel% neq 0 exit /b %errorlevel%
%PYTHON_COMMAND% "%~dp0launchers\demo.py" %*
exit /b %errorlevel%
