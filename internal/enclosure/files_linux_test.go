package enclosure

import (
	"bytes"
	"testing"
)

func TestPlainHosts(t *testing.T) {
	for conf, want := range map[string]string{
		"":                     "",
		"passwd: files\n":      "passwd: files\n",
		"hosts: files dns\n":   "hosts: files dns\n",
		"hosts:files dns":      "hosts:files dns",
		"hosts: dns # all\n":   "hosts: dns # all\n",
		"#hosts: resolve\n":    "#hosts: resolve\n",
		"hosts:\n":             "hosts: dns\n",
		"hosts: db files\n":    "hosts: files dns\n",
		"hosts: mdns4 dns\n":   "hosts: dns\n",
		"a: b\nhosts: x\nc: d": "a: b\nhosts: dns\nc: d",
		"hosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\n": "hosts: files myhostname dns\n",
	} {
		if got := plainHosts([]byte(conf)); string(got) != want {
			t.Errorf("%q is %q, want %q", conf, got, want)
		}
	}
}

func FuzzPlainHosts(f *testing.F) {
	for _, s := range []string{"hosts: files resolve dns\n", "hosts:", ":", "hosts : x # dns", "a\nb"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, conf []byte) {
		plain := plainHosts(conf)
		if again := plainHosts(plain); !bytes.Equal(again, plain) {
			t.Errorf("%q is %q, and that is %q", conf, plain, again)
		}
		if bytes.Count(plain, []byte("\n")) < bytes.Count(conf, []byte("\n")) {
			t.Errorf("%q has lost a line: %q", conf, plain)
		}
	})
}
