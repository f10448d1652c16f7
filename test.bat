@echo off
rem Make or update .venv, check the code with ruff, run the tests. Arguments go to pytest.
rem
rem   test.bat
rem   test.bat -x -k resume
setlocal
call "%~dp0launchers\find_python.bat"
if %errorlevel% neq 0 exit /b %errorlevel%
%PYTHON_COMMAND% "%~dp0launchers\environment.py" requirements.txt requirements-test.txt
if %errorlevel% neq 0 exit /b %errorlevel%
cd /d "%~dp0"

rem lpips is wanted by a few tests, without its dependency torchvision; where it is missing, they are skipped.
.venv\Scripts\python.exe -m pip install --quiet --retries 1 --no-deps -c constraints.txt lpips
if %errorlevel% neq 0 >&2 echo note: lpips could not be installed; the tests that need it are skipped

.venv\Scripts\python.exe -m ruff check .
if %errorlevel% neq 0 exit /b %errorlevel%
.venv\Scripts\python.exe -m pytest -n 2 --dist loadfile --no-loadscope-reorder %*
exit /b %errorlevel%
