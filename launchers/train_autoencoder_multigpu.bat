@echo off
rem Stage 1, the autoencoder, on several GPUs of one Windows machine. AMP and COMPILE are true or false:
rem
rem   launchers\train_autoencoder_multigpu.bat NUM_GPUS CONFIG AMP COMPILE
rem   launchers\train_autoencoder_multigpu.bat 4 config\config_train_multigpu.json true false
setlocal
call "%~dp0multigpu.bat" autoencoder %*
exit /b %errorlevel%
