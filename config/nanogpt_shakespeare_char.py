# nanoGPT's model and recipe for Shakespeare: GPT-2's parts, AdamW, cosine decay, dropout
#     python train.py config/nanogpt_shakespeare_char.py --max_iters=250 --lr_decay_iters=5000
# These 250 updates end at a val loss of 2.071 on the whole validation split (one seed, one core of
# a Zen 5). nanoGPT's train.py, with autocast to bfloat16 switched on for the CPU, ends at 2.061.
out_dir = 'out-nanogpt-shakespeare-char'
eval_interval = 250
eval_iters = 7  # 7 x 64 windows of 256 tokens: the whole validation split

# the size is the default: 6 layers, 6 heads, 384 channels, 64 sequences of 256 tokens
dropout = 0.2
max_iters = 5000
beta2 = 0.99
