"""The openai client asks the real server about a real picture.

dog_umbrella.png is a collage of two drawings of Twemoji (CC-BY 4.0, copyright Twitter, Inc and other contributors).
"""

import asyncio
import base64
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.slow

PICTURE = (
    "data:image/png;base64," + base64.b64encode(Path(__file__).with_name("dog_umbrella.png").read_bytes()).decode()
)
PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def about(question, url=PICTURE):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def seeing(start_server):
    with start_server("--model", "smollm2-eyes") as running:
        yield running


@pytest.fixture(scope="module")
def say(seeing):
    client = openai.OpenAI(base_url=f"{seeing.address}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(messages):
        answer = client.chat.completions.create(model="smollm2-eyes", messages=messages, temperature=0, max_tokens=40)
        return answer.choices[0].message.content

    with client:
        yield ask


def test_questions_about_a_picture(say):
    assert say(about("Is there a dog in the picture?")).startswith("Yes")
    assert say(about("Is there a banana in the picture?")).startswith("No")
    told = say(about("Describe the picture.")).lower()
    assert "dog" in told
    assert "umbrella" in told


def test_a_conversation_goes_on(say):
    first = about("What is in the picture?")
    answer = say(first)
    follow = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Is there a dog?"}]
    assert say(follow).startswith("Yes")


def test_text_alone_is_answered_as_by_smollm2(say):
    assert say(PARIS) == "The capital of France is Paris."


def test_a_bad_picture_is_refused_and_the_next_request_answered(say):
    for url in ("https://example.com/dog.png", "data:image/png;base64,aGVsbG8=", PICTURE[:-1600]):
        with pytest.raises(openai.BadRequestError) as refused:
            say(about("What is this?", url))
        assert refused.value.param == "messages[0].content[0].image_url.url"
    assert say(about("Is there a dog in the picture?")).startswith("Yes")


def test_requests_of_both_kinds_at_once_are_answered_as_alone(seeing, say):
    chats = [about("Describe the picture."), PARIS, about("Is there a bone?"), about("How many dogs are there?")]
    alone = [say(messages) for messages in chats]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{seeing.address}/v1", api_key="none", timeout=60) as client:
            create = client.chat.completions.create
            calls = [create(model="smollm2-eyes", messages=m, temperature=0, max_tokens=40) for m in chats]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone


def test_a_second_look_gives_the_answer_of_the_method_in_python(seeing, say):
    """CARVE by the field ``eff``, alone and beside others, and what /v1/models says of it."""
    import io

    import torch
    from eff_attention.contrastive_focus import CarveConfig, carve_answer
    from eff_embedded.eyes import load_smollm2_eyes
    from PIL import Image

    config = CarveConfig(suffix="", final="refined", max_new_tokens=12)
    picture = Image.open(io.BytesIO(base64.b64decode(PICTURE.partition(",")[2]))).convert("RGB")
    torch.set_num_threads(1)
    wanted = carve_answer(*load_smollm2_eyes(), picture, "Is there a dog in the picture?", config).answer
    eff = {"carve": {"suffix": "", "final": "refined", "max_new_tokens": 12}}

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{seeing.address}/v1", api_key="none", timeout=120) as client:
            assert "carve" in (await client.models.list()).data[0].steering
            common = {"model": "smollm2-eyes", "temperature": 0, "max_tokens": 12}

            def ask(**more):
                return client.chat.completions.create(
                    **common, messages=about("Is there a dog in the picture?"), extra_body=more
                )

            alone = await ask(eff=eff)
            several = await asyncio.gather(ask(eff=eff), ask(), ask(eff={"pai": True}), ask(eff=eff))
            return [a.choices[0].message.content for a in (alone, several[0], several[3])]

    answers = asyncio.run(together())
    assert answers == [wanted] * 3
