"""What the loops of the training scripts call.

autoencoder  stage 1: networks and optimisers, validation, memory
diffusion    stage 2: network and optimiser, samples during training, memory
latents      the latents that stage 2 trains on, and their scale factor
step         optimiser, clipping, learning rate, averaged weights
guard        what the ranks agree on at each step
progress     epoch, batch, step and time; saving and resuming
run_folder   checkpoints of a run, its lock, where a training starts
wrapping     checkpointing, torch.compile, DDP
memory       the predicted peak memory
logs         train_log.jsonl, log.txt, losses.png, TensorBoard
profiler     the trace of a few steps
"""
