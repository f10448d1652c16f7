@echo off
rem Stage 2, the diffusion model, on several GPUs of one Windows machine, with torchrun:
rem
rem   launchers\train_diffusion_multigpu.bat NUM_GPUS CONFIG AMP COMPILE
rem   launchers\train_diffusion_multigpu.bat 4 config\config_train_multigpu.json true false
rem
rem AMP and COMPILE are true or false. Paths are relative to the project's folder. The variable LDM_ENV names
rem another environment file than config\environment.json. demo.bat makes the .venv that this runs in.
setlocal
cd /d "%~dp0.."

set "GPUS=%~1"
set "CONFIG=%~2"
set "AMP=%~3"
set "COMPILE=%~4"
if not defined GPUS set "GPUS=1"
if not defined CONFIG set "CONFIG=config\config_train_multigpu.json"
if not defined AMP set "AMP=true"
if not defined COMPILE set "COMPILE=false"
if not defined LDM_ENV set "LDM_ENV=config\environment.json"

set "NOT_DIGITS="
for /f "delims=0123456789" %%c in ("%GPUS%") do set "NOT_DIGITS=%%c"
if defined NOT_DIGITS >&2 echo error: the first argument, NUM_GPUS, is a number, not %GPUS%& exit /b 2
set "AMP_FLAG="
if /i "%AMP%"=="true" set "AMP_FLAG=--amp"
if /i "%AMP%"=="false" set "AMP_FLAG=--no-amp"
if not defined AMP_FLAG >&2 echo error: the third argument, AMP, is true or false, not %AMP%& exit /b 2
set "COMPILE_FLAG="
if /i "%COMPILE%"=="true" set "COMPILE_FLAG=--compile"
if /i "%COMPILE%"=="false" set "COMPILE_FLAG=--no-compile"
if not defined COMPILE_FLAG >&2 echo error: the fourth, COMPILE, is true or false, not %COMPILE%& exit /b 2
if not exist .venv\Scripts\python.exe >&2 echo error: there is no .venv: demo.bat makes it& exit /b 2

rem PyTorch for Windows has no libuv, and torchrun's own store (2.13) asks for it whatever USE_LIBUV says, so
rem torchrun --standalone fails. The processes therefore meet through a temporary file instead of that store;
rem the store that training itself opens obeys USE_LIBUV.
set USE_LIBUV=0
set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
set "TORCHRUN=.venv\Scripts\python.exe -m torch.distributed.run"
set "MEET=--nnodes=1 --rdzv_backend=c10d --rdzv_conf=store_type=file --local_addr=127.0.0.1"
%TORCHRUN% %MEET% --nproc_per_node=%GPUS% ^
    train_diffusion.py -c "%CONFIG%" -e "%LDM_ENV%" -g %GPUS% %AMP_FLAG% %COMPILE_FLAG%
exit /b %errorlevel%
