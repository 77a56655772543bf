# Evaluate OpenAI's gpt2-xl on Shakespeare, or with --dataset=openwebtext on OpenWebText
#     python train.py config/eval_gpt2_xl.py
# Never run: OpenAI's weights could not be downloaded on the machines where quill was measured.
init_from = 'gpt2-xl'
eval_only = True
dataset = 'shakespeare'
batch_size = 8
block_size = 1024
eval_iters = 500
