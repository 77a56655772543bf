# The reference: a 10M-parameter character GPT (6 layers, 6 heads, 384 wide, context 256, as train.py's defaults say)
#     python train.py config/train_shakespeare_char.py
# 2-core AMD EPYC (Zen 5), bfloat16: val loss 1.4085 (train 1.028) on the whole val split after 1,500 updates of 2.6 s, 66 minutes;
# on another (Zen 4) --max_iters=500 ends at 1.5315 after 36 minutes. With AMX an update took 1.7 s
out_dir = 'out-shakespeare-char'
eval_interval = 250  # it overfits, so evaluate often; model.pth keeps the best
eval_iters = 7  # 7 x 64 windows of 256: all of the val split

# 1,500 updates see the text 24 times; in a proxy (a quarter of the text as often, 4 layers, 224 wide) the val loss was 1.832, with
# input_noise=0.05 in addition 1.857
dropout = 0.2
max_iters = 1500
beta2 = 0.99  # few tokens in a batch: average over more of them

# in a proxy (context 64, 120 updates) the val loss was 2.28 with AdamW at 1e-3 and cosine decay, 2.18 with AdamW at 2e-3
# and constant, then linear decay, 2.09 with Muon in addition
optimizer = 'muon'
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 50
