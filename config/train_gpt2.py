# GPT-2 (124M) on OpenWebText, about 0.5M tokens per update, as in nanoGPT's reproduction of GPT-2
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py
# Never run: no GPU was available. Estimated GPU memory of a compiled update: 0.5 GB per sequence,
# and 2 GB for weights, gradients and AdamW, 18 GB in all. An eager update takes twice as much.
out_dir = 'out-gpt2'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

# 30 sequences x 1,024 tokens x 16 micro-batches = 491,520 tokens per update
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 16
n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
max_iters = 600000  # 295B tokens
min_lr = 6e-5
warmup_iters = 2000
