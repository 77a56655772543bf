# Loss of OpenAI's gpt2-xl on a dataset in its tokens: Shakespeare, or --dataset=openwebtext once it is prepared
#     python train.py config/eval_gpt2_xl.py
# not run: the weights could not be downloaded where quill was measured
init_from = 'gpt2-xl'
eval_only = True
dataset = 'shakespeare'
batch_size = 8
block_size = 1024
eval_iters = 500
