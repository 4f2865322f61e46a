//! The addresses of a network interface.

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses that this machine has on the interface `name`.
///
/// # Errors
/// What the system reports, or that there is no such interface or it has none.
pub(super) fn addresses(name: &str) -> io::Result<Vec<IpAddr>> {
    let mut first = std::ptr::null_mut();
    // SAFETY: getifaddrs fills the pointer with a list of its own, which is freed once, below.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = first;
    // SAFETY: entries and names of the list are valid until it is freed; an address has the type that its family says.
    unsafe {
        while let Some(entry) = next.as_ref() {
            if CStr::from_ptr(entry.ifa_name).to_bytes() == name.as_bytes() {
                found.extend(ip(entry.ifa_addr));
            }
            next = entry.ifa_next;
        }
        libc::freeifaddrs(first);
    }
    match found.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "no such network interface, or it has no address")),
        false => Ok(found),
    }
}

/// # Safety
/// `address` is null, or an address of the type that its family says.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: as the caller promises.
    unsafe {
        match i32::from(address.as_ref()?.sa_family) {
            libc::AF_INET => {
                let address = &*address.cast::<libc::sockaddr_in>();
                Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into())
            }
            libc::AF_INET6 => Some(Ipv6Addr::from((*address.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr).into()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_loopback_has_its_address_and_what_is_not_there_has_none() {
        assert!(super::addresses("lo").unwrap().contains(&[127, 0, 0, 1].into()));
        assert!(super::addresses("nothing0").unwrap_err().to_string().contains("no such network interface"));
    }
}
