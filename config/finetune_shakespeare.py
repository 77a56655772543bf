# Finetune OpenAI's GPT-2 on Shakespeare in GPT-2's tokens
#     python train.py config/finetune_shakespeare.py
# Never run: OpenAI's weights could not be downloaded on the machines where quill was measured.
out_dir = 'out-shakespeare'
init_from = 'gpt2'  # or gpt2-xl, if memory allows
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 0  # evaluate both splits completely: they are small
always_save_checkpoint = False

# 32 micro-batches of one sequence of 1,024 tokens = 32,768 tokens per update;
# the training text has 301,966 tokens, so 20 updates are about two epochs
batch_size = 1
gradient_accumulation_steps = 32
block_size = 1024
max_iters = 20

learning_rate = 3e-5
decay_lr = False  # a constant learning rate
