# Finetune OpenAI's GPT-2 on Shakespeare in its own tokens
#     python train.py config/finetune_shakespeare.py
# not run: the weights could not be downloaded where quill was measured
out_dir = 'out-shakespeare'
init_from = 'gpt2'  # or gpt2-xl, where memory allows
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 0  # the whole splits are small
always_save_checkpoint = False

# 1 x 32 sequences of 1024 tokens; the training text has 301,966 tokens, so 20 updates see it twice
batch_size = 1
gradient_accumulation_steps = 32
block_size = 1024
max_iters = 20

learning_rate = 3e-5
min_lr = 3e-5
decay_lr = False
warmup_iters = 0
