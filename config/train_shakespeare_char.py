# The reference model: a character GPT of 10.65M parameters
#     python train.py config/train_shakespeare_char.py
# 2-core AMD EPYC (Zen 5), bfloat16: val loss 1.4085 (train loss 1.028) after 1,500 updates of
# 2.6 s, 66 minutes in all. With --max_iters=500, val loss 1.5315 after 36 minutes on a Zen 4.
# Val loss is measured on the whole validation split. The defaults of train.py give the model's
# size: 6 layers, 6 heads, 384 channels, a context of 256.
out_dir = 'out-shakespeare-char'
eval_interval = 250  # the model overfits, so evaluate often; model.pth keeps the best weights
eval_iters = 7  # 7 x 64 windows of 256 tokens: the whole validation split

# 1,500 updates are 24 epochs. input_noise did not pay: a smaller test (4 layers, 224 channels,
# a quarter of the text, the same number of epochs) reached 1.832, and 1.857 with input_noise=0.05
dropout = 0.2
max_iters = 1500
beta2 = 0.99  # an update has few tokens, so average over more updates

# val loss after 120 updates with a context of 64: 2.28 with AdamW at 1e-3 and cosine decay,
# 2.18 with AdamW at 2e-3 and linear decay, 2.09 with Muon at the same schedule
optimizer = 'muon'
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 50
