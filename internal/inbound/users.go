package inbound

import (
	"crypto/sha256"
	"crypto/subtle"
)

// Users are the clients that may use a proxy, by name and password. Nil Users let everybody in;
// empty ones nobody.
type Users map[string]string

// Check says whether name may enter with password. The time it takes tells neither how much of the
// password is right nor how long it is. Nil Users need no password: Check is true.
func (u Users) Check(name, password string) bool {
	if u == nil {
		return true
	}
	want, known := u[name]
	a, b := sha256.Sum256([]byte(password)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && known
}
