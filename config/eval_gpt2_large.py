# Loss of OpenAI's gpt2-large on a dataset in its tokens: Shakespeare, or --dataset=openwebtext once it is prepared
#     python train.py config/eval_gpt2_large.py
# not run: the weights could not be downloaded where quill was measured
init_from = 'gpt2-large'
eval_only = True
dataset = 'shakespeare'
batch_size = 8
block_size = 1024
eval_iters = 500
