"A random Llama in 16 bits on disk, with a random adapter of it as `save` writes it: tuned.py FOLDER SHAPE METHOD SHARD"
import json, sys
from pathlib import Path

def make(folder, shape, method, shard):
    "(the model with its adapter, its tokenizer), written to `base` and `tuned`"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from ftkit.chat import set_template
    from ftkit.models import save
    from ftkit.tiny import train_tokenizer
    torch.set_default_dtype(torch.bfloat16)
    model,tok = LlamaForCausalLM(LlamaConfig(**shape)),train_tokenizer([])
    model.save_pretrained(folder/'base', max_shard_size=shard)
    set_template(tok, 'chatml')
    tok.save_pretrained(folder/'base')
    model.config._name_or_path = str(folder/'base')
    model = get_peft_model(model, LoraConfig(r=16, target_modules='all-linear', task_type='CAUSAL_LM'))
    for n,p in model.named_parameters():
        if p.requires_grad: p.data = p.data.float()
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.01)
    model.ftkit = dict(model=str(folder/'base'), adapter=method, precision='bf16')
    save(model, tok, folder/'tuned')
    return model, tok

if __name__ == '__main__':
    folder,shape,method,shard = sys.argv[1:]
    make(Path(folder), json.loads(shape), method, shard)
