# The reference: a 10M-parameter character GPT (6 layers, 6 heads, 384 wide, context 256, as train.py's defaults say)
#     python train.py config/train_shakespeare_char.py
# 2-core AMD EPYC (Zen 4), bfloat16: --max_iters=500 ends at val loss 1.536 (train 1.298) on the whole val split; an update
# takes 4.3 s there, 1.7 s with AMX
out_dir = 'out-shakespeare-char'
eval_interval = 250  # it overfits, so evaluate often; model.pth keeps the best
eval_iters = 7  # 7 x 64 windows of 256: all of the val split

dropout = 0.2  # 5000 updates see the text 82 times
max_iters = 5000
beta2 = 0.99  # few tokens in a batch: average over more of them

# in a proxy (context 64, 120 updates) the val loss was 2.28 with AdamW at 1e-3 and cosine decay, 2.18 with AdamW at 2e-3
# and constant, then linear decay, 2.09 with Muon in addition
optimizer = 'muon'
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 50
