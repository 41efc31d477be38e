"""What each field of a request means, in a line, for the OpenAPI document. Neighbour: `openapi.py`."""

from __future__ import annotations

DESCRIPTIONS = {
    "model": "A served name; without it the first one answers.",
    "prompt": "A text, texts, token ids or lists of token ids. Special tokens' names in texts stay text.",
    "messages": "The conversation. Special tokens' names in messages stay text: no message can forge a turn.",
    "max_tokens": "Tokens to generate at most; the context's end is a bound too.",
    "max_completion_tokens": "The same as max_tokens; without both the context's end is the bound.",
    "min_tokens": "Tokens to generate before anything may end the sample.",
    "temperature": "0 takes the likeliest token.",
    "top_p": "Keep the likeliest tokens up to this probability.",
    "top_k": "Keep that many of the likeliest tokens; 0 or -1 keeps all.",
    "min_p": "Keep tokens of at least this share of the likeliest one's probability.",
    "n": "Samples of each prompt.",
    "best_of": "Samples to choose the n best from, by mean logprob.",
    "stop": "A string or strings that end a sample; they are not part of its text.",
    "stop_token_ids": "Token ids that end a sample.",
    "include_stop_str_in_output": "Keep the stop string in the text.",
    "ignore_eos": "Go on after a token that ends a document or a turn.",
    "seed": "Makes samples repeatable; sample i uses seed + i.",
    "presence_penalty": "Subtracted from the logits of tokens in the output.",
    "frequency_penalty": "Subtracted from the logits of tokens in the output, as often as they are there.",
    "repetition_penalty": "Makes tokens in prompt and output less likely if above 1.",
    "logit_bias": "Added to the logits of token ids.",
    "allowed_token_ids": "The only token ids that may be generated.",
    "bad_words": "Texts whose tokens, as the tokenizer cuts the text alone or behind a space, may not follow one another.",
    "logprobs": "Report logprobs of generated tokens: in completions the number of alternatives, in chats true.",
    "top_logprobs": "Alternatives to report beside each generated token; needs logprobs.",
    "prompt_logprobs": (
        "Alternatives to report beside each token of the prompt. A model whose source is not its last layer reads the whole "
        "prompt for them, whatever of it is cached."
    ),
    "echo": "Begin the text with the prompt, and logprobs with the prompt's, as prompt_logprobs does.",
    "return_token_ids": "Report token ids beside texts.",
    "stream": "Answer with server-sent events.",
    "stream_options": "What a stream carries besides its text; needs stream.",
    "include_usage": "End the stream with a chunk of usage.",
    "continuous_usage_stats": "Put usage into every chunk.",
    "response_format": "What the text must look like.",
    "structured_outputs": "What the text must look like: JSON schema, regular expression, choice or grammar.",
    "priority": "Lower values are served first, equal ones in order of arrival; others wait as long as such keep coming.",
    "cache_salt": "Cached state is shared only among requests of equal salt.",
    "truncate_prompt_tokens": "Keep only so many of the prompt's last tokens.",
    "user": "Who asks; for the client's own records.",
    "request_id": "A name for the request.",
    "latents": "Report the latent after the last token, or all.",
    "add_special_tokens": "Put the document's start before a prompt; left out: as the checkpoint says.",
    "allow_special": (
        "Special tokens' names in the prompt are those tokens. Left out: only where the prompt is nothing but one name."
    ),
    "add_generation_prompt": "End with what opens the assistant's turn.",
    "continue_final_message": "Leave the last message open, to be continued; excludes add_generation_prompt.",
    "return_token_strs": "Report each token's text.",
    "tokens": "Token ids.",
    "role": "Who says it; the developer's messages count as the system's.",
    "content": "A text, or parts of type text, which become a line each.",
}
