# Evaluate OpenAI's GPT-2 on Shakespeare, or with --dataset=openwebtext on OpenWebText
#     python train.py config/eval_gpt2.py
#     python train.py config/eval_gpt2.py --init_from=gpt2-xl
# Never run: OpenAI's weights could not be downloaded on the machines where quill was measured.
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl
eval_only = True
dataset = 'shakespeare'
batch_size = 8
block_size = 1024
eval_iters = 500
