@echo off
rem Stage 2, the diffusion model, on several GPUs of one Windows machine. AMP and COMPILE are true or false:
rem
rem   launchers\train_diffusion_multigpu.bat NUM_GPUS CONFIG AMP COMPILE
rem   launchers\train_diffusion_multigpu.bat 4 config\config_train_multigpu.json true false
setlocal
call "%~dp0multigpu.bat" diffusion %*
exit /b %errorlevel%
