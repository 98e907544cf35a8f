"""A red row shows its whole pattern."""


def failures(checks):
    """Run every check; one message for all that fail, so that a red row shows its whole pattern."""
    messages = []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except AssertionError as error:
            messages.append(str(error))
    assert not messages, f"{len(messages)} combinations fail:\n" + "\n".join(messages[:20])
