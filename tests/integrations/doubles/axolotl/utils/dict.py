"""axolotl's config: a key that is not there is `None`."""


class DictDefault(dict):
    def __getattr__(self, name):
        return self.get(name)
