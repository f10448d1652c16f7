@echo off
rem Called by demo.bat and test.bat: sets PYTHON_COMMAND to a Python 3.11 or newer that can make a .venv.
rem In this order: the variable PYTHON, the project's .venv, the py launcher, python on the PATH.
setlocal
set "PYTHON_COMMAND="
if not defined PYTHON goto search
call :try "%PYTHON:"=%"
goto found

:search
if exist "%~dp0..\.venv\Scripts\python.exe" call :try "%~dp0..\.venv\Scripts\python.exe"
for %%v in (3.13 3.12 3.11 3) do if not defined PYTHON_COMMAND call :try py -%%v
if not defined PYTHON_COMMAND call :try python

:found
if not defined PYTHON_COMMAND goto none
endlocal & set PYTHON_COMMAND=%PYTHON_COMMAND%
exit /b 0

:none
>&2 echo error: no Python 3.11 or newer with its venv module was found.
>&2 echo Install one from python.org, or set the variable PYTHON to the path of its python.exe.
exit /b 2

:try
%* -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" >nul 2>nul
if %errorlevel% equ 0 set PYTHON_COMMAND=%*
exit /b 0
