# A GPT of 4.9M parameters, in the shape of Qwen3, that learns to write whole stories on a laptop
#     python data/tinystories/prepare.py --mb=200
#     python train.py config/train_tinystories.py
# Never run: the stories could not be downloaded on the machines where quill was measured.
out_dir = 'out-tinystories'
dataset = 'tinystories'
eval_interval = 500
eval_iters = 40
sample_prompt = 'Once upon a time'

# 5 layers of 256 channels; the 4,096 tokens share one matrix with the output
n_layer = 5
n_head = 2
n_embd = 256
batch_size = 32
activation = 'swiglu'
norm = 'rmsnorm'
norm_eps = 1e-6
rotary = True
qk_norm = True
zero_init = True
max_iters = 5000  # 41M tokens

optimizer = 'muon'
learning_rate = 3e-3
muon_lr = 0.02
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
