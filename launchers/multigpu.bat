@echo off
rem Called by train_autoencoder_multigpu.bat and train_diffusion_multigpu.bat, which name STAGE:
rem
rem   launchers\multigpu.bat STAGE NUM_GPUS CONFIG AMP COMPILE
rem
rem AMP and COMPILE are true or false. Paths are relative to the project's folder. The variable LDM_ENV names
rem another environment file than config\environment.json. demo.bat makes the .venv that this runs in.
setlocal
cd /d "%~dp0.."

set "STAGE=%~1"
set "GPUS=%~2"
set "CONFIG=%~3"
set "AMP=%~4"
set "COMPILE=%~5"
if not defined GPUS set "GPUS=1"
if not defined CONFIG set "CONFIG=config\config_train_multigpu.json"
if not defined AMP set "AMP=true"
if not defined COMPILE set "COMPILE=false"
if not defined LDM_ENV set "LDM_ENV=config\environment.json"
for /f "delims=0123456789" %%c in ("%GPUS%") do >&2 echo error: NUM_GPUS: expected a number, found %GPUS%& exit /b 2
if not exist .venv\Scripts\python.exe >&2 echo error: .venv is missing. Run demo.bat, which makes it& exit /b 2

rem PyTorch for Windows has no libuv, and torchrun's own store (2.13) asks for it whatever USE_LIBUV says, so
rem torchrun --standalone fails. The processes therefore meet through a temporary file instead of that store;
rem the store that training itself opens obeys USE_LIBUV.
set USE_LIBUV=0
set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
set "TORCHRUN=.venv\Scripts\python.exe -m torch.distributed.run"
set "MEET=--nnodes=1 --rdzv_backend=c10d --rdzv_conf=store_type=file --local_addr=127.0.0.1"
%TORCHRUN% %MEET% --nproc_per_node=%GPUS% ^
    train_%STAGE%.py -c "%CONFIG%" -e "%LDM_ENV%" -g %GPUS% ^
    --set %STAGE%_train.amp=%AMP% --set %STAGE%_train.compile=%COMPILE%
exit /b %errorlevel%
